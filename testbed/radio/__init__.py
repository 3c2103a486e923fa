"""The papers' analytic setting: routing of a real model, replayed over simulated radio links."""
