"""Random faults while answers are made: does every one end, and are those that look right right?"""
