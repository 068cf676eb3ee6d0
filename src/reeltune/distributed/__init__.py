"""How processes share a run: engines, launches, the watchdog."""
