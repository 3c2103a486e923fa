"""Radio, temperatures and power of a device, sampled in a process of their own so that frames do not wait for it.

`process` (in the node) starts `__main__` (the sampler's loop). It calls `sampler`, which runs tools through `commands`
and reads files through `sysfs`. The parsers `wifi`, `raspberry`, `jetson` and `sysfs` are pure.
"""
