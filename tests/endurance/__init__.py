"""What is shown by numbers: tens of thousands of damaged checkpoints, a thousand processes that are killed."""
