"""Proof of the software itself: faults, other processors, deployment to fresh machines, accuracy of link estimates.

It needs a clone of the repository and is not in the wheel.
"""
