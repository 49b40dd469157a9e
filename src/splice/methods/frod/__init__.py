"""FRoD: all weights of a kind share one basis, in which each of them is a trained sparse matrix."""
