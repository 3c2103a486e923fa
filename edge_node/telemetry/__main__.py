"""The sampler's process: a line of JSON per second on stdout, until nobody reads it any more."""

import os
import signal
import sys
import time

from edge_node.telemetry.process import EVERY_S
from edge_node.telemetry.sampler import Sampler
from wire.telemetry import encode_telemetry

_NICE = 19


def main(node: str, boot_id: str, host: str, port: str) -> None:
    """Sample until the reader is gone."""
    # The reader ends this process; Ctrl-C in a terminal reaches both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)
    sampler = Sampler(node, boot_id, broker=(host, int(port)))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    due_s = time.monotonic()
    try:
        while True:
            os.write(1, encode_telemetry(sampler.sample()) + b"\n")
            due_s = max(due_s + EVERY_S, time.monotonic())
            time.sleep(max(0.0, due_s - time.monotonic()))
    except BrokenPipeError:
        return
    finally:
        sampler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
