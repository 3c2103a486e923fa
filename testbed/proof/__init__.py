"""Proof of the software itself: faults, fuzzing, other processors, deployment to fresh machines. Not in the wheel."""
