"""From predictions to metrics, figures, a summary and one page of all runs. No film is opened, no network used.

metrics.py has the metrics with intervals, baseline.py the forest of file properties. figures.py draws, files.py
writes the files of a result, summary.py writes it as text. comparison.py makes one page of all finished runs.
"""
