"""Tests of the public interface, without processes."""
