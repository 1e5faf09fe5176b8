"""Results without films and networks: predictions become metrics, figures, words and one page of all runs.

metrics.py measures predictions, figures.py draws them, files.py writes the files of a result, summary.py puts it
into words, comparison.py makes one page of all finished runs.
"""
