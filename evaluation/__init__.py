"""From a trained model to results: generation, metrics, baselines, bootstrap, report, gallery, charts."""
