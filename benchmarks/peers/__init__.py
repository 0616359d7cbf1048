"""The stock forms of each op, one file an op; each takes the op's arguments and gives the op's result.

They get what they like best: every image has the same number of regions, and regions come in image order. Ours does not
rely on it.
"""
