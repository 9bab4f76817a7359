"""Progress of a run: what each stage has done and still has to do.

plan           the stages, and what each one still has to do
stage_records  what each stage has done, and the key that says for which inputs
versions       versions of the libraries, for reports and logs
"""
