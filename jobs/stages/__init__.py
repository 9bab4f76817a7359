"""The stages, each of which is the work of one Ray job.

entry          runs one stage and keeps its record
inputs         datasets that a stage takes from earlier stages
prepare        stage 1: prompts, models, vocabularies, identities
preflight      checks that read no model and import no engine
synthesize     stage 2: written prompts, answers, the dataset
filter         the filters inside stages 2 and 3
score          stage 3: every teacher's rows, the dataset to train on
train          stage 4: student and twin
export         stage 5: Hugging Face folders
evaluate       stage 6: measures all models, writes the report
preference     a judge's preference between answers of two models
serving        serves one model, makes figures of its answers
holdout        hold-out likelihoods of all models
rounds_report  the report's rows for stages and rounds
teacher_pools  work, progress and time of the teachers' engines
"""
