"""The sections of `wdmoe-testbed bench`: each measures one thing against its floor."""
