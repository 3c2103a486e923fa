"""MQTT brokers that run as child processes, and the embedded broker that they run."""
