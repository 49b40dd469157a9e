"""Which lines of splice could be changed without a test that notices: `make mutants`."""
