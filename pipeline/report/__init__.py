"""The report of a run: what the student gained and lost against each teacher.

statistics      intervals and pooled figures
headlines       sentences that compare the student with each model
tables          tables for a terminal
figures         numbers, percentages and prices as text
curves          the training curves as SVG
colours         one colour for each model
page            the HTML page, complete in itself
report.html.j2  the page's template
"""
