"""The report of a run: the student's gains and losses against each teacher.

models          all figures of a report, the content of report.json
statistics      intervals and pooled figures
rounding        whether log-probabilities differ by rounding alone
fidelity        closeness to the teachers and differences, with intervals
answers         prompts whose answers are shown side by side
comparisons     fidelity in words, and its table
headlines       sentences that compare the student with each model
tables          tables for a terminal
numbers         numbers and percentages as text
curves          the training curves as SVG
colours         one colour for each model
page            the HTML page, complete in itself
report.html.j2  the page's template
"""
