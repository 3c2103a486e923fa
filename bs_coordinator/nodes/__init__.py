"""What the base station knows of its nodes: status, telemetry and clocks."""
