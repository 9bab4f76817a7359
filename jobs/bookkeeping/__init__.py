"""What each stage of a run has done and still has to do.

plan           what each stage still has to do
stage_records  what each stage has done, and under which key
"""
