"""How long keys are valid, in days."""

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365.0
"""Default of `wdmoe-testbed keys --days`, and validity of what `wdmoe-testbed fleet` makes."""
RENEWAL_DAYS = 30
"""A certificate should be renewed when it expires within this time."""
