"""The base station: runs the trunk and the gate, chooses experts, asks the nodes that hold them.

The data's way: `generate` (tokens) → `model` (one forward step) → `trunk` (attention, gate) → `selection`
(which experts) → `dispatch` (frames to nodes and back). `fleet` knows which node holds what.
"""
