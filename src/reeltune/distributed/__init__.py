"""How processes share a run: DDP, FSDP, ZeRO, launchers, the watchdog."""
