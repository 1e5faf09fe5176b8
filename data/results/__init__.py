"""From predictions to metrics, figures, a summary and one page of all runs. No film is opened, no network used.

- metrics.py: metrics with intervals
- baseline.py: the random forest of file properties
- figures.py, files.py, summary.py: a result as pictures, as files and in words
- comparison.py: one page of all finished runs
"""
