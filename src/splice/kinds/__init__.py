"""What a method builds on: adapter layers of each kind, their host, and the record that says what a method is."""
