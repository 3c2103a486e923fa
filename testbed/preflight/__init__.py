"""Preflight: can a plan run here and now? Checked before anything is measured.

`plan_checks` checks this machine and the plan's files, `nodes` and `iperf` gather facts about nodes and links,
`verdicts` (pure) judges them, and `preflight` puts it all together.
"""
