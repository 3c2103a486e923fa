"""Can a plan be run here and now? Asked before anything is measured.

`plan_checks` asks this machine and the plan's files, `nodes` and `iperf` gather what nodes and links are like,
`verdicts` (pure) judges them, `preflight` puts it together.
"""
