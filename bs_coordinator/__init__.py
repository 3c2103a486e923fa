"""The base station: runs the trunk and the gate, chooses experts, and asks the nodes that hold them.

A token passes through `engine` (sequences and steps), `trunk` (attention and gate), `selection` (which experts) and
`dispatch` (frames to nodes and back). `nodes` keeps track of which node holds which experts.
"""

import common  # noqa: F401 - switches off onnxruntime's telemetry before any module here imports it
