"""What the commands that train no stage of their own say on ``--help``, at most 80 columns wide."""

CHECK = """Looks at the data as a run will, in seconds: reads and checks every row, says
which format was detected, counts what is bad, double, too long or cut, and
shows one pair token by token. Of millions of rows, --sample 1000 reads and
checks all, but encodes and counts only as many, chosen by data.seed.

Takes what `spin-lightning fit` takes, or `sft`. Two settings are enough:

  spin-lightning check --data.train_data my_data.jsonl \\
    --model.model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct

What you may want to set, here and in the run:
  --data.columns '{prompt: question, completion: answer}'
                                       your names of the columns
  --data.format messages               where two formats fit
  --data.on_bad_row drop               leave bad rows out, counted, instead of
                                       refusing the data
  --data.max_prompt_tokens 512         rows with longer prompts are left out,
                                       counted
  --data.generator.max_new_tokens 256  cap on the answers; longer real ones are
                                       cut, counted. For sft
                                       --data.max_response_tokens
  --data.prompt_template alpaca        where the model has no chat template

A run writes the same counts to data_report.json in its folder.
Colours are for terminals; NO_COLOR=1 turns them off, FORCE_COLOR=1 on.
The exit code is 0 if a run can begin, else 2."""

PLAN = """Says before a run what it will read, how many updates it has, what memory each
device needs for training and for generation, and what the run leaves on disk;
and where something does not fit, which settings would help. Reads the data and
the model's config, and no weights: a model of 7B is planned on a laptop.

Takes what `spin-lightning fit` takes, or `sft`, and also:
  --memory 24GiB                       of one device, instead of those here
  --devices 8                          short for --trainer.devices 8
  --rows 50000 --prompt-tokens 200 --response-tokens 250
                                       assume these instead of reading data
  --sample 1000                        of the rows, encode and count only these
  --probe                              load the model, and take the time of a
                                       pass and of some responses
  --price-per-hour 2.50                of one device, for the cost of all that:
                                       with --probe
  --json                               for tools: bytes, tokens and seconds

On a CPU the figures of memory are within 15 % of what was measured; on a GPU
within 10 % of ten measurements on an H200, where a step with compiled layers
takes 5 to 25 % less than is planned. docs/scale.md has the equations,
docs/gpu.md the measurements.
The exit code is 0 if the run could begin, whether or not it fits, else 2."""

PLAY = """The game of `spin-lightning fit`, with the same settings, folder and results.
Each iteration has two stages, each in processes of its own that end with it:
  generate   the opponent answers, and both answers are scored
  train      the policy trains on them and is exported
So training and generation never hold memory at the same time, and may be
started in different ways. The same command continues a killed run, at any
stage; fit and play continue each other's.

Takes what `spin-lightning fit` takes, and also:
  --launcher 'torchrun --nproc_per_node 8'
                                       starts the stage that trains: it takes
                                       the place of python in
                                       `python -m spin_lightning fit`
  --generate-launcher '...'            the same for the stage that generates.
                                       Left out, that is one process if there is
                                       a --launcher, else what the trainer's
                                       settings say

One stage alone: spin-lightning fit --self_play.stage generate, or train.
A stage that fails ends it with its exit code. SIGTERM, SIGINT and SIGUSR1 go to
the stage, and end both where the run can be continued."""

SCORE = """A reward says what each response is worth; everything is kept in a folder, and
the same command continues where it was killed: no judge is asked twice.

  spin-lightning score \\
    --model.model_name_or_path runs/mine/policy \\
    --data.train_data held_out.jsonl \\
    --data.answers_per_prompt 4 \\
    --score.reward NumberMatch \\
    --score.output_dir runs/mine_scored

The sections model and data are those of `spin-lightning fit`, and a config of
it can be given; all rows of data.train_data are scored (data.val_fraction 0).

  --score.reward NumberMatch           1 for the right final number, 0.1 for
                                       another, 0 for none; also TextMatch,
                                       FunctionReward, ModelReward, JudgeReward,
                                       SumOfRewards, or a class path of yours
  --score.reward.pattern equals        a setting of that reward; all of them:
                                       --score.reward.help NumberMatch
  --score.output_dir runs/score        where everything is kept
  --score.against MODEL                the win rate against another model
  --score.part held_out                the rows that fit sets aside for its NLL
  --score.right_from 1.0               the reward of a right one, for pass@k
  --score.best_from 1.0                leave worse ones out of best.jsonl
  --score.shard_size 64                prompts that a kill asks about again
  --data.answers_per_prompt 4          responses to each prompt; 0 scores the
                                       responses of the data instead
  --data.generator.temperature 0       the most likely response, and no sample
  --data.generator.max_new_tokens 256  cap on the responses
  --trainer.accelerator gpu            and --trainer.precision bf16-true

Results:
  summary.json   mean and its error, pass@k, best of n, win rate
  best.jsonl     the best response to each prompt: rows for `spin-lightning sft`
  pairs.jsonl    chosen, rejected, preference, margin: for `dpo` and `reward`
  responses/ rewards/ against/ comparisons/
                 tables in Parquet, with what made them in *_manifest.json

docs/score.md and docs/rewards.md have more."""

COMPARE = """Plays arms from one start model on one data set, each with several seeds, and
ends with a table, a picture and one sentence: which is better, by how much, and
what of that is noise. "Too close to call" is an answer.

  spin-lightning compare --config configs/compare.yaml \\
    --model.model_name_or_path MY_SFT_MODEL --data.train_data rows.jsonl

Takes what `spin-lightning fit` takes, for every arm that has the setting. The
arms, where none are listed: self_play, continued SFT with as many updates, with
as many token-passes, and tuned (learning rates, early stopping, mean weights).

  --compare.output_dir runs/compare    a run's folder for each arm and seed
  --compare.seeds 3                    1 gives an interval over rows alone
  --compare.reward NumberMatch         beside the exact match; score --help
  --compare.temperatures '[0, 0.7, 1]' sharpening is free, so each arm is
                                       judged at its best one
  --compare.samples 4                  responses to a prompt above 0
  --compare.learning_rates '[1.0e-5, 3.0e-5, 1.0e-4]'
                                       what the tuned SFT tries
  --data.val_data held_out.jsonl       one half to choose by, one to report on
  --data.other_data others.jsonl       other tasks: what is forgotten

Arms of your own stand in the config:
  compare:
    arms:
      - {name: hot, stage: fit, model: {beta: 5}}
      - {name: more, stage: sft, equal_compute: hot}
      - {name: tuned, stage: sft, learning_rates: [1.0e-5, 1.0e-4]}

The same command continues after a kill: what is over is skipped. An arm that
ends with NaN is left out, and the sentence says so. docs/compare.md has more."""

EVALUATE = """Asks a model tasks of lm-evaluation-harness, and prints each number with its
standard error. pip install 'spin-lightning[eval]'

  spin-lightning evaluate runs/mine
  spin-lightning evaluate runs/mine/iteration_0/policy --tasks my_rows.jsonl

MODEL is an exported folder (policy/ or adapter/), a run's folder, of which the
last policy is taken, or a name on the hub. Without --tasks these are the six of
the paper: arc_challenge 25 shots, truthfulqa_mc2 0, winogrande 5, gsm8k 5,
hellaswag 10 and mmlu 5. Their data are on the hub.

  --tasks hellaswag my_rows.jsonl      names, .yaml files of the harness,
                                       folders of them, or .jsonl files with
                                       question, choices and answer; or prompt
                                       and target
  --shots 5                            examples before each question: one number
                                       or one for each task
  --limit 100                          the first documents of each task only
  --against MODEL                      another model, and the paired difference
  --chat_template true                 ask in messages; off is the paper's way
  --batch_size 8                       sequences in one pass
  --device cuda                        and --dtype bfloat16 instead of that
                                       which is stored
  --output FOLDER                      where evaluation.json goes
  --base MODEL                         what an adapter is put on, if that moved
  --revision main                      of a name on the hub, and
                                       --trust_remote_code true

Results are written to evaluation.json beside the model's summary.json, each as
soon as it is there, and on the model's card. The same command does not ask
again what was asked of the same weights in the same way. docs/evaluate.md"""

REPORT = """Makes one HTML file of a run's folder, offline and under 2 MB: what happened in
words, curves, responses of the iterations side by side, data, settings, hashes.

  spin-lightning report runs/mine      writes runs/mine/report.html
  spin-lightning report runs/mine --against runs/sft
                                       draws the curves of another run over it;
                                       can be given several times

  --output FILE.html                   write it elsewhere
  --samples 8                          prompts whose responses are shown

RUN is the folder of any run: of fit, sft, dpo, reward, ppo or score, over or
not, or one that holds runs: a chain's or a demo's. A run keeps its report.html
current by itself; --report.enabled false leaves it out.

docs/report.md says how to read it."""

CHAT = """Talks with a model in the terminal.

  spin-lightning chat runs/mine
  spin-lightning chat runs/mine --iteration 0
  spin-lightning chat runs/mine --against 0
  spin-lightning chat runs/mine --against HuggingFaceTB/SmolLM2-135M-Instruct

RUN is the folder of a run, of a model or of an adapter, a .gguf file, or a hub
name. Of a run with iterations its last model is taken.
  --iteration 0                        the model of another iteration
  --against OTHER                      a second model, which answers the same
                                       questions: what RUN may be, or the number
                                       of an iteration of RUN
  --system TEXT                        what the conversation begins with
  --temperature 0.7                    0: the most likely response
  --top_p 1.0
  --max_new_tokens 512
  --seed 0                             the same questions, the same responses
  --prompt_template alpaca             where the model has no chat template
  --dtype bfloat16                     else float32 on a CPU, and on a GPU what
                                       the model is stored in
  --device cuda                        else a GPU where there is one

In a conversation, Ctrl-C stops the response, and
  /reset                               begins another conversation
  /save FILE                           adds it to FILE: a row for sft
  /quit                                ends, as Ctrl-D does

Where the input is no terminal, each line is a question of its own:
  spin-lightning chat runs/mine < questions.txt
  spin-lightning chat runs/mine --json < questions.txt > rows.jsonl"""

PAIRS = """Writes what a game or `spin-lightning score` has made of prompts as rows that
other trainers read. A row is a pair: the better and the worse response.

  spin-lightning pairs runs/mine --output pairs.jsonl

RUN is the folder of a game, of one of its iterations, or of score.
  --iteration 0                        whose opponent answered; all: every one.
                                       Left out: the last one with pairs
  --format trl                         conversations: TRL's DPO and reward
                                       trainers, OpenRLHF, and our own dpo
  --format trl_text                    texts as the chat template wrote them,
                                       with the end token: TRL, no template
  --format axolotl                     type: chat_template.default
  --format llama_factory               sharegpt with ranking, and the entry for
                                       dataset_info.json
  --output FILE                        .jsonl or .parquet. Left out: JSONL on
                                       the standard output
  --drop identical clipped             leave out pairs of equal responses, pairs
                                       with a response that was cut, or both

FILE.provenance.json says where the rows come from: iterations, opponents,
sampling, seed, versions, hashes. Each row has its iteration, prompt, seed and
opponent, in columns that these trainers do not read.

docs/handover.md has more."""

PUSH = """Uploads an exported model to a repository of the Hugging Face hub in one commit:

  export HF_TOKEN=...
  spin-lightning push runs/mine USER/NAME

FOLDER is policy/, adapter/ or reward_model/, or a run's folder, of which the
last one is taken. The files, their sizes and the repository are shown first,
and it is asked whether that is meant.

  --private false                      a public repository; a new one is private
  --revision v1                        a branch, which is made if need be
  --message '...'                      of the commit
  --base USER/NAME                     what an adapter's base is called on the
                                       hub
  --pairs                              the pairs of a game's iterations
                                       instead, as a data set
  --yes                                do not ask

The token is taken from the environment only. A folder that is not whole, and a
file with what looks like a secret, are refused. docs/push.md has more."""

SLURM = """Prints a batch script for a SLURM cluster:

  spin-lightning slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 -- \\
    play --config run.yaml > run.sbatch
  sbatch run.sbatch

Before `--`, what the job asks for; each further option goes to #SBATCH as it
is, such as --partition gpu or --account mine:
  --nodes 1
  --gpus-per-node 1
  --time 24:00:00
After it, a command of this package that trains: fit, play, sft, dpo, reward,
ppo, or a chain of them, whose file is read now. Its processes are one for each
GPU, started by srun; trainer.num_nodes and trainer.devices are added. The run's
folder has to be on a disk that all nodes see.

Five minutes before its time is over the job is sent SIGUSR1: the run saves what
it has and ends, and the script queues the job again, which continues it."""

CHAIN = """Runs the stages of a file in order, each from the model that the last one has
exported, and prints what each gained: updates, time, held-out NLL and reward.
The same command continues a chain that was killed, in whatever stage.

  output_dir: runs/line            # each stage has a folder of its name in it
  common:                          # for all stages that have these settings
    data: {train_data: rows.jsonl, val_data: held_out.jsonl}
    trainer: {precision: bf16-true}
  stages:
    - sft:                         # the word, and settings as in its config
        model: {model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct}
    - fit:                         # starts from runs/line/sft/policy
        config: spin.yaml          # a file of settings, beside this one
        self_play: {iterations: 2}
    - fit:
        name: again                # a word that is there twice needs names
        model: {model_name_or_path: {from: sft}}

Where a setting is a path, {from: STAGE} is the model that a stage before this
one has exported, and {from: STAGE, path: NAME} a file or folder in its run's
folder. What is said last wins: a config, common, the stage, its flags.

  --sft.model.learning_rate 1e-5       over what the file says
  --common.trainer.accelerator cpu     the same for all stages without their own
  launcher: torchrun --nproc_per_node 8
                                       in a stage: takes the place of python;
                                       also --STAGE.launcher '...'

All settings and files are looked at before the first stage starts. A stage that
is over is skipped; where the file has changed since, its command says whether
it may be. A stage that fails ends the chain with its exit code, a signal ends
both where they can be continued."""

SCHEMA = """Prints a JSON Schema by which an editor completes the settings of a config as it
is written, shows what each is, and marks what a run would refuse: a wrong name,
a text for a number, a number out of its range.

  spin-lightning schema > spin-lightning.schema.json
                                       of all stages, known by their sections,
                                       and of the files of chain and compare
  spin-lightning schema fit > fit.schema.json
                                       of one: fit, sft, ppo, dpo, reward,
                                       score; or chain, compare

Then the first line of a config says where the schema is:

  # yaml-language-server: $schema=spin-lightning.schema.json

docs/settings.md shows it in VS Code and PyCharm."""
