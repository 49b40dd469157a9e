"""AdaMSS: several small subspaces of each weight are adapted, as many in the whole model as a budget allows."""
