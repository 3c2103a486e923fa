"""`python -m edge_node`: the same as `wdmoe-node`."""

from edge_node.cli import main

main()
