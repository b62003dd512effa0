//! Looking before an erase: which keys, what dies with them, what would remain. Changes nothing.

use std::path::Path;

use super::{LiveMount, Plan, PlannedKey, Prepared, Shared, Target, Victim};
use crate::crypto::VolumeId;
use crate::kms::{self, Binding, KeyIdentity, KeyUri, Purpose, Wrapped};
use crate::service::control::Client;
use crate::service::journal::{self, Place};
use crate::service::record::{self, path_text};
use crate::service::trust::{self, Pin};
use crate::service::{Error, SCHEMA, backing, mountinfo, places};
use crate::volume::meta::{Body, Slot, VolumeFile};

/// Looks at what an erase would do. `uris` are keys given with the command, for a volume without a pin.
///
/// # Errors
/// Not a volume; no key known; the provider is not configured.
pub fn prepare(victim: &Victim, uris: &[KeyUri]) -> Result<Prepared, Error> {
    let (volume, bodies, dir, path) = match victim {
        Victim::Backing(path) => {
            let path = backing::canonical(path, "backing directory")?;
            let dir = backing::open(&path)?;
            let copies = VolumeFile::read(&dir)?;
            let bodies: Vec<Body> = copies.iter().map(|copy| copy.body().clone()).collect();
            let Some(first) = bodies.first() else { return Err(crate::volume::meta::MetaError::NotAVolume.into()) };
            (first.volume_id, bodies, Some(dir), Some(path))
        }
        Victim::OutOfReach(volume) => (*volume, Vec::new(), None, None),
    };
    let own = || bodies.iter().filter(|body| body.volume_id == volume);
    let claims: Vec<Claim> = own().flat_map(claims).collect();
    let removed: Vec<Claim> = own().flat_map(claims_removed).collect();
    let pin = trust::find(volume)?.map(|found| found.pin);
    let mut targets = pin.as_ref().map(of_pin).unwrap_or_default();
    add_given(&mut targets, uris, &claims, &removed)?;
    if targets.is_empty() {
        return Err(Error::Usage(format!(
            "this host has no pin for volume {volume}, so its volume file is not believed: name the key with --key URI"
        )));
    }
    for target in &mut targets {
        target.probe = probe(volume, target, &claims);
    }
    let (mut left, mut paper): (Vec<KeyIdentity>, Vec<KeyIdentity>) = (Vec::new(), Vec::new());
    for claim in &claims {
        let known = targets.iter().any(|target| target.identity.same_key(&claim.slot.identity));
        // Paper is out of anybody's reach; the plan says so.
        let list = if matches!(claim.slot.identity, KeyIdentity::Recovery { .. }) { &mut paper } else { &mut left };
        if !known && !list.contains(&claim.slot.identity) {
            list.push(claim.slot.identity.clone());
        }
    }
    let keys = describe(&targets)?;
    let shared_with = shared(volume, &targets);
    let begun = match &dir {
        Some(dir) => journal::read_backing(dir),
        None => existing_on_host(volume),
    };
    let plan = Plan {
        schema: SCHEMA,
        volume_id: volume,
        label: bodies.first().map(|body| body.label.clone()).or_else(|| pin.as_ref().map(|pin| pin.label.clone())),
        backing: path.as_deref().map(path_text::encode),
        pinned: pin.is_some(),
        live_mounts: live_mounts(volume, &shared_with)?,
        remains: remains(&targets, &left, &bodies, dir.is_some()),
        keys,
        left,
        paper,
        shared_with,
        contents: path.as_deref().map(backing::count),
        begun,
    };
    Ok(Prepared { plan, targets, backing: dir })
}

/// Never makes the state directory: a plan changes nothing.
pub(super) fn existing_on_host(volume: VolumeId) -> Option<journal::Journal> {
    Place::Host(places::erase_dir().ok()?.join(format!("{volume}.json"))).read(volume)
}

/// A slot as some copy of the volume file has it.
struct Claim {
    scope: u32,
    version: u32,
    slot: Slot,
}

fn claims(body: &Body) -> impl Iterator<Item = Claim> {
    body.scopes.iter().flat_map(|scope| {
        scope.keks.iter().flat_map(|kek| {
            let (scope, version) = (scope.id, kek.version);
            kek.slots.iter().map(move |slot| Claim { scope, version, slot: slot.clone() })
        })
    })
}

/// Slots that were taken out, as the volume file remembers them.
fn claims_removed(body: &Body) -> impl Iterator<Item = Claim> {
    body.scopes.iter().flat_map(|scope| {
        scope.keks.iter().flat_map(|kek| {
            let (scope, version) = (scope.id, kek.version);
            kek.removed().into_iter().map(move |slot| Claim { scope, version, slot })
        })
    })
}

fn of_pin(pin: &Pin) -> Vec<Target> {
    pin.slots()
        .map(|(scope, version, slot)| Target {
            scope,
            version,
            slot: slot.id,
            identity: slot.identity.clone(),
            uri: slot.uri.clone(),
            probe: None,
        })
        .collect()
}

/// Keys given with the command: those of the volume file's claims that the URI can mean, else what stands there now. The
/// destruction itself checks the identity again.
fn add_given(targets: &mut Vec<Target>, uris: &[KeyUri], claims: &[Claim], removed: &[Claim]) -> Result<(), Error> {
    let pinned = !targets.is_empty();
    for uri in uris {
        // Named as this host knows it: two servers may have keys of one name.
        if !matches!(uri, KeyUri::File(_)) && targets.iter().any(|target| target.uri == *uri) {
            continue;
        }
        // A name means any key file, so if one is there, its id says which key it is.
        let held = match uri {
            KeyUri::File(_) => kms::admin(uri)?.describe().ok().map(|described| described.identity),
            KeyUri::Transit(_) | KeyUri::Pkcs11(_) | KeyUri::Aws(_) => None,
        };
        let means = |identity: &KeyIdentity| {
            held.as_ref().map_or_else(|| identity.is_named_by(uri), |held| held.same_key(identity))
        };
        // The pin knows this key already.
        let known: Vec<usize> = (0..targets.len()).filter(|n| means(&targets[*n].identity)).collect();
        for n in &known {
            let target = &mut targets[*n];
            if !matches!(uri, KeyUri::File(_)) {
                target.uri = uri.clone();
                continue;
            }
            // A key file may have moved, or the path may be wrong: the place known before is not let go for it.
            let (scope, version, slot, identity) = (target.scope, target.version, target.slot, target.identity.clone());
            if targets.iter().all(|target| target.uri != *uri || target.identity != identity) {
                targets.push(Target { scope, version, slot, identity, uri: uri.clone(), probe: None });
            }
        }
        if !known.is_empty() {
            continue;
        }
        let before = targets.len();
        for claim in claims.iter().chain(removed).filter(|claim| means(&claim.slot.identity)) {
            if targets.iter().all(|target| target.identity != claim.slot.identity) {
                targets.push(Target {
                    scope: claim.scope,
                    version: claim.version,
                    slot: claim.slot.id,
                    identity: claim.slot.identity.clone(),
                    uri: uri.clone(),
                    probe: None,
                });
            }
        }
        if targets.len() > before {
            continue;
        }
        // A file that holds none of the pin's keys is some other volume's.
        if !claims.is_empty() || (pinned && held.is_some()) {
            return Err(Error::Usage(format!("{uri} is not among the keys of this volume: see `lethefs status`")));
        }
        let identity = kms::admin(uri)?.describe()?.identity;
        targets.push(Target { scope: 0, version: 1, slot: 1, identity, uri: uri.clone(), probe: None });
    }
    Ok(())
}

/// Something that the key had wrapped: the canary, which opens nothing.
fn probe(volume: VolumeId, target: &Target, claims: &[Claim]) -> Option<(Binding, Wrapped)> {
    let claim = claims.iter().find(|claim| {
        claim.slot.identity == target.identity && claim.version == target.version && !claim.slot.canary.0.is_empty()
    })?;
    let binding = Binding { volume, scope: claim.scope, version: claim.version, purpose: Purpose::Canary };
    Some((binding, claim.slot.canary.clone()))
}

fn describe(targets: &[Target]) -> Result<Vec<PlannedKey>, Error> {
    let mut keys: Vec<PlannedKey> = Vec::new();
    let (mut unconfigured, mut configured) = (None, false);
    for target in targets {
        if keys.iter().any(|key| key.uri == target.uri && key.identity.same_key(&target.identity)) {
            continue;
        }
        let mut key = PlannedKey {
            name: target.identity.name(),
            identity: target.identity.clone(),
            uri: target.uri.clone(),
            description: None,
            problem: None,
            erasable: Some(false),
            obstacle: None,
        };
        match kms::admin(&target.uri) {
            Ok(admin) => {
                configured = true;
                let described = admin.describe();
                key.problem = described.as_ref().err().map(ToString::to_string);
                key.description = described.ok();
                match admin.may_destroy(&target.identity) {
                    Ok(told) => key.erasable = told,
                    Err(error) => key.obstacle = Some(super::run::problem(&error)),
                }
            }
            // Of two servers this host may know only one: the other's keys are shown all the same.
            Err(error) => {
                key.problem = Some(error.to_string());
                key.obstacle = Some(super::run::problem(&error));
                unconfigured = unconfigured.or(Some(error));
            }
        }
        keys.push(key);
    }
    match unconfigured {
        Some(error) if !configured => Err(error.into()),
        _ => Ok(keys),
    }
}

fn shared(volume: VolumeId, targets: &[Target]) -> Vec<Shared> {
    let dies = |pin: &Pin| pin.slots().any(|(_, _, slot)| targets.iter().any(|t| t.identity.same_key(&slot.identity)));
    trust::all()
        .into_iter()
        .map(|found| found.pin)
        .filter(|pin| pin.volume_id != volume && dies(pin))
        .map(|pin| Shared { volume_id: pin.volume_id, label: pin.label })
        .collect()
}

/// Mounts on this host of the volume and of those that die with it, and mounts that nobody here can ask.
fn live_mounts(volume: VolumeId, shared: &[Shared]) -> Result<Vec<LiveMount>, Error> {
    let mounts = mountinfo::read().map_err(Error::io("cannot read /proc/self/mountinfo"))?;
    let users: Vec<u32> = mounts.iter().filter(|mount| mount.is_lethefs()).filter_map(|mount| mount.user).collect();
    let records = record::all(&users);
    let mut live = Vec::new();
    for (record, files) in &records {
        let concerned = record.volume_id == volume || shared.iter().any(|shared| shared.volume_id == record.volume_id);
        if !concerned {
            continue;
        }
        let reachable = Client::connect(&files.socket).is_ok();
        let mounted = mounts.iter().any(|mount| mount.is_lethefs() && mount.mountpoint == record.mountpoint);
        if reachable || mounted {
            let mountpoint = path_text::encode(&record.mountpoint);
            live.push(LiveMount { volume_id: Some(record.volume_id), mountpoint, reachable });
        }
    }
    for mount in mounts.iter().filter(|mount| mount.is_lethefs()) {
        let known = |path: &Path| records.iter().any(|(record, _)| record.mountpoint == path);
        if !known(&mount.mountpoint) {
            live.push(LiveMount {
                volume_id: None,
                mountpoint: path_text::encode(&mount.mountpoint),
                reachable: false,
            });
        }
    }
    Ok(live)
}

/// What nobody here can exclude.
fn remains(targets: &[Target], left: &[KeyIdentity], bodies: &[Body], within_reach: bool) -> Vec<String> {
    let mut remains = Vec::new();
    let mut seen: Vec<&KeyIdentity> = Vec::new();
    let keks = || bodies.iter().flat_map(|body| &body.scopes).flat_map(|scope| &scope.keks);
    for slot in keks().flat_map(|kek| &kek.slots) {
        if matches!(slot.identity, KeyIdentity::Recovery { .. }) && !seen.contains(&&slot.identity) {
            seen.push(&slot.identity);
            remains.push(format!(
                "the shares on paper of slot {} ({}) open any copy of the volume file from before (backups, snapshots, saved headers): this erase empties the slot here and reaches neither paper nor copies",
                slot.id, slot.identity
            ));
        }
    }
    let removed: Vec<Slot> = keks().flat_map(|kek| kek.removed()).collect();
    for (n, slot) in removed.iter().enumerate() {
        let dies = targets.iter().any(|target| target.identity.same_key(&slot.identity));
        if !dies && !removed[..n].iter().any(|other| other.identity == slot.identity) {
            remains.push(format!(
                "slot {} was removed, and {} still opens copies of the volume file from before that: destroy it as well (--key)",
                slot.id,
                slot.identity.to_string().escape_debug()
            ));
        }
    }
    let mut add = |text: &str| remains.push(text.to_owned());
    if targets.iter().any(|target| matches!(target.identity, KeyIdentity::Transit { .. })) {
        add("a snapshot or backup of the key service, restored, brings the key back: destroy or outwait those, too");
    }
    if targets.iter().any(|target| matches!(target.identity, KeyIdentity::Pkcs11 { .. })) {
        add(
            "a backup or clone of the token, or a copy of the key under another id, opens the volume as before: destroy those, too",
        );
    }
    if targets.iter().any(|target| matches!(target.identity, KeyIdentity::Aws { .. })) {
        add(
            "until its date a scheduled deletion can be cancelled; replicas of a multi-region key open the volume as before",
        );
    }
    if targets.iter().any(|target| matches!(target.identity, KeyIdentity::File { .. })) {
        add(
            "any copy of the key file (backups, snapshots, the blocks of the disk it lay on) opens the volume as before",
        );
    }
    if !left.is_empty() {
        add(
            "the volume file names further keys (unverified) for which no URI is known here: each of them opens the volume",
        );
    }
    add("mounts on other hosts keep what they cached, and their keys, until they are unmounted or notice");
    add("what programs copied out of the volume is not in it any more");
    if !within_reach {
        add("the wrapped keys stay in the volume file, which is out of reach: harmless once the KMS keys are gone");
    }
    remains
}
