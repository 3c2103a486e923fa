"""What the base station knows about its nodes: status, telemetry and clocks."""
