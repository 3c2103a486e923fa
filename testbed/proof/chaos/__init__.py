"""Random faults during answers: each answer must end, and be right unless it is reported as degraded or failed."""
