"""From a sweep's flags to finished runs: the plan, and the launchers that carry it out."""
