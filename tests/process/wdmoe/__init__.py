"""Tests of the public interface, with a broker and node processes."""
