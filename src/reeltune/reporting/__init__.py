"""What a run writes about itself: log, metrics, ledger, report, charts, first batch."""
