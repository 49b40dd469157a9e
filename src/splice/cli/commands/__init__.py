"""The commands, one file each: its name is the name of the file, and its function is called `command`."""
