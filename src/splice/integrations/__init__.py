"""What other libraries say about their models, asked for where it is needed; none of them is imported before."""
