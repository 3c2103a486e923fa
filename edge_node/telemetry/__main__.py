"""The sampler's process: prints a line of JSON per second on stdout until its reader has closed the pipe."""

import os
import signal
import sys
import time

from edge_node.telemetry.process import EVERY_S
from edge_node.telemetry.sampler import TelemetrySampler
from wire.telemetry import encode_telemetry

_NICE = 19


def main(node: str, boot_id: str, host: str, port: str) -> None:
    """Sample until the reader has closed the pipe."""
    # Ctrl-C in a terminal reaches this process too, but the node decides when it ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(_NICE)
    sampler = TelemetrySampler(node, boot_id, broker=(host, int(port)))
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
