"""What a device tells of itself: radio, temperatures, power. A process of its own, so that no frame waits for it.

`process` (in the node) starts `__main__` (the sampler's loop), which asks `sampler`, which asks `commands` and
`sysfs`; what comes back is understood by the parsers `wifi`, `raspberry`, `jetson` and `sysfs`, which are pure.
"""
