"""What a run tells: log, ledger, report, charts, first batch."""
