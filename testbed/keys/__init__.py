"""Who may connect, and what each may read and write: certificates, frame keys, the broker's access list."""
