"""The ways in which layers store their weight: a file for each. Nothing else knows that there is more than one."""
