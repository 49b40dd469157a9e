"""The program `splice`: what its commands share. Nothing below imports from here."""
