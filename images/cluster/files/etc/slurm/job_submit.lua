-- slurmctld asks this for each job that is submitted (job_submit_lua, slurm.conf(5): JobSubmitPlugins).
--
-- Slurm adds up once a minute what each user has used, and until then takes users for equal who are not: whoever comes first
-- with hundreds of jobs would have them all run before another's one. So a job stands behind equal ones of other users by one
-- point of priority for each job that its user has submitted in the last minute or so. Fair share counts in thousands.

local DECAY_S = 60
local MOST = 1000
local NICE_OFFSET = 0x80000000 -- slurm.h

-- By user: how many jobs, which are forgotten as time passes, and as of when.
local submitted = {}
local counted_at = {}

-- How many tasks "0-9:3,17%2" has; one for a job that is no array. Nobody has looked yet at what the user wrote: what is no
-- range must not make it fewer.
local function tasks(array)
    local count = 0
    for part in (array or "0"):gsub("%%.*", ""):gmatch("[^,]+") do
        local first, last, step = part:match("^(%d+)-(%d+):?(%d*)$")
        local more = first and math.floor((last - first) / math.max(tonumber(step) or 1, 1)) + 1 or 1
        -- Digits without end are no number (inf - inf), and what is added to that is none for good.
        count = count + ((more ~= more or more > MOST) and MOST or more)
    end
    return math.max(count, 1)
end

function slurm_job_submit(job_desc, _, uid)
    local now = os.time()
    local before = (submitted[uid] or 0) * math.exp(((counted_at[uid] or now) - now) / DECAY_S)
    submitted[uid] = before + tasks(job_desc.array_inx)
    counted_at[uid] = now
    local nice = job_desc.nice
    if nice == slurm.NO_VAL then
        nice = NICE_OFFSET
    end
    job_desc.nice = nice + math.min(math.floor(submitted[uid] - 0.5), MOST)
    return slurm.SUCCESS
end

-- What a job was put behind others for it stays behind: its user may put it further back, and no further to the front.
function slurm_job_modify(job_desc, job_rec, _, uid)
    if uid ~= 0 and job_desc.nice ~= slurm.NO_VAL and job_desc.nice < job_rec.nice then
        slurm.log_user("a job's nice value can only be made greater")
        return slurm.ERROR
    end
    return slurm.SUCCESS
end
