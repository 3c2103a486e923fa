"""MQTT brokers run as child processes."""
