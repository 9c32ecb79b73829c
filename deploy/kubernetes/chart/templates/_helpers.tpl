{{/* Names. The RayCluster has the full name; KubeRay's Services and pods add up to 13 characters to it. */}}
{{- define "lorafleet.fullname" -}}
{{- $name := ternary .Release.Name (printf "%s-lorafleet" .Release.Name) (contains "lorafleet" .Release.Name) -}}
{{- $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "lorafleet.controller" -}}
{{ include "lorafleet.fullname" . }}-head-svc:{{ include "lorafleet.controllerPort" . }}
{{- end -}}

{{/* The code's default ports; a test compares them. */}}
{{- define "lorafleet.controllerPort" -}}50050{{- end -}}
{{- define "lorafleet.httpPort" -}}8000{{- end -}}
{{- define "lorafleet.gcsPort" -}}6379{{- end -}}
{{- define "lorafleet.rayAgentPort" -}}52365{{- end -}}

{{/* The labels that select pods. KubeRay sets app.kubernetes.io/name of its pods itself. */}}
{{- define "lorafleet.selectorLabels" -}}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "lorafleet.labels" -}}
{{ include "lorafleet.selectorLabels" . }}
app.kubernetes.io/name: lorafleet
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end -}}

{{/* override: an image whose empty fields default to values.image; its own repository or tag replaces that digest. */}}
{{- define "lorafleet.image" -}}
{{- $image := .root.Values.image -}}
{{- $own := .override | default dict -}}
{{- $repository := $own.repository | default $image.repository -}}
{{- $is_other := or $own.repository $own.tag $own.digest -}}
{{- $digest := ternary $own.digest $image.digest (not (empty $is_other)) -}}
{{- $tag := $own.tag | default $image.tag | default .root.Chart.AppVersion -}}
{{- if $digest -}}{{ $repository }}@{{ $digest }}{{- else -}}{{ $repository }}:{{ $tag }}{{- end -}}
{{- end -}}

{{/* The fields of every pod. The user is the image's. */}}
{{- define "lorafleet.podBasics" -}}
serviceAccountName: {{ include "lorafleet.fullname" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile:
    type: RuntimeDefault
{{- with .placed.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .placed.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "lorafleet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Requests equal limits, so that no pod is evicted first when its node runs short. */}}
{{- define "lorafleet.resources" -}}
{{- $amounts := dict "cpu" .cpu "memory" .memory -}}
{{- if .gpus }}{{ $_ := set $amounts "nvidia.com/gpu" .gpus }}{{ end -}}
requests:
  {{- toYaml $amounts | nindent 2 }}
limits:
  {{- toYaml $amounts | nindent 2 }}
{{- end -}}

{{/* The places where a container of the image may write. */}}
{{- define "lorafleet.scratchMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/lorafleet
{{- end -}}

{{- define "lorafleet.scratchVolumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: 4Gi
- name: home
  emptyDir:
    sizeLimit: 256Mi
{{- end -}}

{{/* The mounts of a container that reads the model or adapters: the same paths everywhere. */}}
{{- define "lorafleet.modelMounts" -}}
- name: cache
  mountPath: /cache
{{- range $name, $claim := pick .Values.storage "model" "adapters" }}
{{- if $claim.claimName }}
- name: {{ $name }}
  mountPath: {{ $claim.mountPath }}
  readOnly: true
{{- end }}
{{- end }}
{{- if .Values.fleet.huggingFaceTokenSecret }}
- name: huggingface-token
  mountPath: /run/secrets/huggingface
  readOnly: true
{{- end }}
{{- end -}}

{{- define "lorafleet.modelVolumes" -}}
- name: cache
  emptyDir:
    sizeLimit: {{ .Values.storage.cacheSize }}
{{- range $name, $claim := pick .Values.storage "model" "adapters" }}
{{- if $claim.claimName }}
- name: {{ $name }}
  persistentVolumeClaim:
    claimName: {{ $claim.claimName }}
    readOnly: true
{{- end }}
{{- end }}
{{- with .Values.fleet.huggingFaceTokenSecret }}
- name: huggingface-token
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{- define "lorafleet.modelEnv" -}}
- name: LORAFLEET_CACHE
  value: /cache
- name: HF_HOME
  value: /cache/huggingface
{{- if .Values.fleet.huggingFaceTokenSecret }}
- name: HF_TOKEN_PATH
  value: /run/secrets/huggingface/token
{{- end }}
{{- end -}}

{{/* /dev/shm: memory that a pod's containers share. */}}
{{- define "lorafleet.sharedMemory" -}}
- name: dshm
  emptyDir:
    medium: Memory
    sizeLimit: {{ . }}
{{- end -}}

{{- define "lorafleet.flagsVolume" -}}
- name: flags
  configMap:
    name: {{ include "lorafleet.fullname" . }}-flags
{{- end -}}

{{- define "lorafleet.tenantsVolume" -}}
{{- with .Values.tenantsSecret }}
- name: tenants
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{- define "lorafleet.tokenVolume" -}}
- name: token
  secret:
    secretName: {{ .Values.fleet.tokenSecret }}
    defaultMode: 0440
{{- end -}}

{{/* Fetches the demo model into a pod's /cache before anything that reads it starts. */}}
{{- define "lorafleet.demoModel" -}}
{{- if .Values.fleet.demoModel -}}
initContainers:
  - name: demo-model
    image: {{ include "lorafleet.image" (dict "root" .) }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    command: [python, /opt/lorafleet/examples/demo_model.py]
    env:
      - name: LORAFLEET_CACHE
        value: /cache
    securityContext:
      {{- include "lorafleet.containerSecurity" . | nindent 6 }}
    resources:
      {{- include "lorafleet.resources" (dict "cpu" "1" "memory" "2Gi") | nindent 6 }}
    volumeMounts:
      {{- include "lorafleet.scratchMounts" . | nindent 6 }}
      - name: cache
        mountPath: /cache
{{- end }}
{{- end -}}

{{/* Probes of HTTP servers. Liveness does not depend on workers: a restart would not bring them back. */}}
{{- define "lorafleet.httpProbes" -}}
startupProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /ready, port: http}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- end -}}

{{/* Ray's own health check, which needs no token. On the head it also covers the GCS. */}}
{{- define "lorafleet.rayProbes" -}}
startupProbe:
  httpGet: {path: /api/healthz, port: agent}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /api/healthz, port: agent}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 24
readinessProbe:
  httpGet: {path: /api/healthz, port: agent}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
{{- end -}}

{{/*
The environment of every Ray container. KubeRay adds RAY_AUTH_MODE and RAY_AUTH_TOKEN to a pod's first container.
Workers must not run at Ray's lowest priority, and a lost node is to be noticed within some 8 s instead of a minute.
*/}}
{{- define "lorafleet.rayEnv" -}}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_worker_niceness
  value: "0"
- name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO
  value: "0"
- name: RAY_health_check_initial_delay_ms
  value: "5000"
- name: RAY_health_check_period_ms
  value: "500"
- name: RAY_health_check_timeout_ms
  value: "1000"
- name: RAY_health_check_failure_threshold
  value: "5"
{{- end -}}

{{/*
`ray start` with fixed ports that differ from those of the controller, the workers and outgoing connections. The fleet
keeps nothing in Ray's object store, so the store gets Ray's minimum, not the default of 30 % of the pod's memory.
*/}}
{{- define "lorafleet.rayStartParams" -}}
object-store-memory: "104857600"
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
dashboard-agent-grpc-port: "6383"
dashboard-agent-listen-port: {{ include "lorafleet.rayAgentPort" . | quote }}
metrics-export-port: "8080"
min-worker-port: "10002"
max-worker-port: "10999"
{{- end -}}
