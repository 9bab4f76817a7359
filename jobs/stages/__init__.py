"""The stages: what each one's Ray job does.

entry          runs one stage and keeps its record
inputs         what a stage takes from earlier stages
prepare        stage 1: prompts, models, vocabularies, identities
preflight      checks of recipes and filters
synthesize     stage 2: written prompts, answers, the dataset
filter         the filters inside stages 2 and 3
score          stage 3: every teacher's rows
train          stage 4: student and twin
export         stage 5: Hugging Face folders
evaluate       stage 6: measures all models, writes the report
serving        answers of one served model to the hold-out prompts
holdout        hold-out likelihoods of all models
rounds_report  the report's rows for stages and rounds
teacher_pools  engines, progress and price that stages share
"""
