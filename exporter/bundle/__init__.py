"""Writing bundles: experts in parallel, trunk, manifest, and a journal to resume from."""
