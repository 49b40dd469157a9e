"""source -> checkpoint -> keys -> plan -> commit -> report: the road of a load, in this order."""
