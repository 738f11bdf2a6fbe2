"""Looking into a run: status, lineage, gallery, thresholds, cost."""
