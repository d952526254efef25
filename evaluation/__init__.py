"""From a trained model to results: generation, relevance, metrics, baselines, bootstrap, report, gallery, charts."""
